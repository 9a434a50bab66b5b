"""Pictures, captions and negative prompts to train on."""
