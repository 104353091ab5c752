"""Where snapshots and residuals are kept: pools of memory slots, and the tiers below them."""
