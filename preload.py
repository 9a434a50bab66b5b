"""A1111 and Forge read their command line with this: --sun-dir names one more folder with adapters."""


def preload(parser):
    parser.add_argument("--sun-dir", type=str, default=None, help="folder with SUN adapters, besides models/sun")
