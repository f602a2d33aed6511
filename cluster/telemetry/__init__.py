"""What a running ring tells Prometheus, through Ray's metrics agents and `headrace serve`."""
