"""Client of spiked: message contract, subscriber, control. Imports numpy, pyzmq and msgpack only."""
