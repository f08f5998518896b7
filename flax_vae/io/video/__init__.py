"""What reading a video file or image takes, each a file: `video_reader` holds what others call."""
