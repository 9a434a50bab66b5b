"""ComfyUI-Manager and A1111/Forge run this file by themselves. SUN needs only torch and safetensors, which both have."""
