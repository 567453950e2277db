"""The cache: keeps exact answers of deterministic requests and replays them as streams."""
