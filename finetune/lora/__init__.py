"""LoRA: where it goes, its layers, its files, its verbs."""
