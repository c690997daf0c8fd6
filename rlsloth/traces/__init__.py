"""What a teacher wrote: sampling, keeping, choosing and writing traces."""
