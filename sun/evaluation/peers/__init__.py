"""The methods without training that SUN is measured against."""
