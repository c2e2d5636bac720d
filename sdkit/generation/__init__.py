"""From the call of a task to its pictures, and how a picture remembers the call."""
