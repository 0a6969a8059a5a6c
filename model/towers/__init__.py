"""The two towers in the shapes of the released ones, and the layers they share."""
