"""From images to rows: features embedded once, predictions, and the base of what scores them."""
