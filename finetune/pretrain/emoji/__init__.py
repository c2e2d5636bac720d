"""A run on pictures that nobody here drew: emoji of one subject in three styles, a LoRA for the third."""
