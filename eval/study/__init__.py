"""The papers' experiments: grids of ordinary train, sample, grade runs, and one report of each grid."""
