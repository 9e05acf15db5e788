"""The user interface of a run: options, progress, tables, TensorBoard, and signals of the terminal."""
