"""What a batch job does around train.py: check its nodes first, requeue it or not."""
