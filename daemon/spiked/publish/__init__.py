"""Publishing: ZeroMQ, and MQTT for status."""
