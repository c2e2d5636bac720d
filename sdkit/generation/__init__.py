"""From what a call of a task asks for to its pictures, and how a picture remembers it."""
