"""What the paper prints, as it prints it; the one place with its digits.

Wang et al., "Kalman Normalization", NeurIPS 2018. A dash is where it prints nothing.

Where its text and its tables differ, these are the tables: in section 4.1.2 KN gains
3.4 on BRN (2.4 by Table 4); in 4.3.2 KN at batch size 2 has 91.0 (90.9 in Tables 7 and
8) and gains 1.4 on GN on CIFAR-100 (in Table 8 that is ResNet-32 on CIFAR-10).
"""

from __future__ import annotations

#: (row, column) -> what is printed there
Grid = dict[tuple[str, str], str]


def _grid(text: str) -> Grid:
    head, *rows = [
        [cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()
    ]
    return {
        (label, column): cell
        for label, *cells in rows
        for column, cell in zip(head[1:], cells, strict=True)
        if cell != "-"
    }


#: ImageNet top-1 accuracy (%) at batch size 32, and steps to 73.1 %
TABLE1 = _grid("""
   | Inceptionv2 | Iters@73.1% | ResNet101 | ResNet50
BN | 73.1        | 170k        | 77.4      | 76.4
GN | -           | -           | -         | 75.9
KN | 74.0        | 100k        | 78.3      | 76.8
""")

#: parameters, in millions
TABLE2 = _grid("""
   | Inceptionv2 | ResNet101 | ResNet50
BN | 11.29       | 44.55     | 25.56
GN | 11.29       | 44.55     | 25.56
KN | 11.30       | 44.60     | 25.58
""")

#: training speed of Inception-v2 on four Titan X; the ratio from section 4.1.1
TABLE3 = _grid("""
        | examples/s
BN      | 325.74
KN      | 320.94
BN / KN | 1.015
""")

#: ImageNet top-1 accuracy (%) of ResNet-50 at batch size 4
TABLE4 = _grid("""
    | Option A | Option B
BN  | 72.7     | 75.0
BRN | 73.7     | 73.7
GN  | -        | 75.8
KN  | 76.1     | 76.1
""")

#: ImageNet top-1 accuracy (%) of Inception-v2 at batch size 1, option B
TABLE5 = _grid("""
    | Acc @120k iters
BN  | 45.88
BRN | 45.24
KN  | 47.99
""")

#: COCO AP (%) of Mask R-CNN; BN* is frozen batch norm
TABLE6 = _grid("""
    | box AP | mask AP
BN* | 36.7   | 32.1
GN  | 37.7   | 32.5
KN  | 37.8   | 33.1
""")

#: CIFAR-10 accuracy (%) of the small Inception
TABLE7 = _grid("""
              | using online mean/var | using moving mean/var
BN (bs = 2)   | 90.0                  | 89.4
BN (bs = 128) | 90.0                  | 92.1
KN (bs = 2)   | 90.9                  | 90.9
""")

#: accuracy (%), option A
TABLE8 = _grid("""
               | Inception CIFAR10 | Inception CIFAR100 | Inception SVHN | ResNet32 | ResNet110
BN (bs = 2)    | 89.4              | 63.8               | 98.06          | 91.2     | -
BRN (bs = 2)   | 90.38             | 65.72              | 98.04          | -        | -
WN (bs = 2)    | 87.83             | 62                 | 97.92          | -        | -
LN (bs = 2)    | 77.7              | 47.02              | 97.98          | -        | -
GN (bs = 2)    | -                 | -                  | -              | 91.3     | -
KN (bs = 2)    | 90.9              | 67.3               | 98.16          | 92.7     | -
BN (bs = 128)  | 92.1              | 70.5               | 98.08          | -        | 93.8
GN (bs = 128)  | -                 | -                  | -              | -        | 92.6
KN (bs = 128)  | -                 | -                  | -              | -        | 94.3
""")  # noqa: E501

#: of the curves one value, in section 4.1.2: top-1 accuracy (%), batch size 1
FIGURE3 = _grid("""
   | Option A
KN | 0.4
""")

#: of the curves two differences, in section 4.3.1: accuracy (%), batch size 2
FIGURE4 = _grid("""
          | accuracy
BKN - BN  | 1.5
GKN - GN  | 0.4
""")
