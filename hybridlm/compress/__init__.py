"""Smaller models out of trained ones: what each part is worth, cutting parts out, and the search for what to cut
(MiniPuzzle: Nemotron-H, arXiv 2504.03624, section 4)."""
