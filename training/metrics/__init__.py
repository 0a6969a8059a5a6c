"""What a run measures and says: records, TensorBoard, console, norms."""
