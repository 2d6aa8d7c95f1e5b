"""The engines that arms are compared on."""
