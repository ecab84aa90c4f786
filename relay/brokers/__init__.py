"""What carries events between processes; see `relay.brokers.base` for the interface."""
