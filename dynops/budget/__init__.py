from .macs import LayerMacs, MacCounter
