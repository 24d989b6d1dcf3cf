"""The test kit: a real Headrace, scripted upstreams and raw callers, all on real sockets of this machine."""
