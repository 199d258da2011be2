"""The battery: methods under the same attacks."""
