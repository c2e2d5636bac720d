"""Files of models: every format read and written, and the one place that decides what a path is."""
