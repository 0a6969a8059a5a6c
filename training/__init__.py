"""Everything that knows ranks or DeepSpeed. Imports neither `model` nor `data`."""
