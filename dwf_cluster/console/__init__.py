"""What a person sees of a run: progress, tables, TensorBoard, and how the terminal ends it."""
