"""The engines that turn token ids into token ids; `base` is the protocol they share."""
