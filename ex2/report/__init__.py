"""What runs show: pictures, curves, studies, the page."""
