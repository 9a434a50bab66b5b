"""ComfyUI-Manager and A1111/Forge run this file by themselves. SUN needs torch and safetensors; both have them."""
