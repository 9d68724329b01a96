"""The shim's contract as checks that can be run against any server of containerd's sandbox Controller."""
