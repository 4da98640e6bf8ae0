"""Studies of many runs: scaling laws, the speedrun, the comparisons that the paper's claims rest on."""
