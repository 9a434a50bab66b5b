"""The methods SUN is measured against: training-free NASA and NAG, LCM-LoRA, guided distillation of the full U-Net."""
