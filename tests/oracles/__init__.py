"""Independent answers: plain NumPy float64 written from the papers, importing nothing of ours."""
