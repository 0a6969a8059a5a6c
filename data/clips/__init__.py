"""One clip: its streams, one cut of it with picture and sound, and back to an mp4."""
