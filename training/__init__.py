"""Everything that knows ranks or DeepSpeed."""
