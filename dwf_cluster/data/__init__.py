"""Images: read once in the driver (`sources`), then kept on the device that trains (`device`)."""
