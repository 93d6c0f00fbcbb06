"""Every method in float64 and the papers' notation: what the fast code is tested against."""
