"""The monitor for a terminal: `spiked monitor`, also over SSH. Needs the extra `monitor` (textual); reads the public protocol only."""
