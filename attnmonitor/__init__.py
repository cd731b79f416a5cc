"""attnmonitor: know what every attention head of a transformer is doing while it trains."""
