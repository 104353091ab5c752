"""Models that own NumPy buffers: what `longtape.Sweep` asks of them, checks of them and does with them."""
