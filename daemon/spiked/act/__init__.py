"""Acting on spikes: rules, limits, the ledger, and the ways to a stimulator."""
