"""Imports go one way through the house."""

import ast

from tests.helpers import ROOT

LEAVES = {'errors', 'runtime', 'config', 'flops', 'devices'}  # what anyone may import
RUNS = {'ops', 'kernels', 'nn', 'data', 'checkpoints', 'training', 'inference'}
ALLOWED = {
    'errors': set(),
    'runtime': {'errors'},
    'config': {'errors'},
    'flops': {'config'},
    'devices': set(),
    'ops': set(),
    'kernels': {'ops'},
    'nn': {'ops', 'kernels', 'config'},
    'data': {'config', 'errors'},
    'checkpoints': {'config', 'errors'},
    'training': {'nn', 'ops', 'data', 'checkpoints', *LEAVES},
    'inference': {'nn', 'ops', 'kernels', 'data', 'checkpoints', *LEAVES},
    'evaluation': RUNS | LEAVES,
    'sweeps': {*RUNS, *LEAVES, 'evaluation'},  # its plots
    'compiling': RUNS | LEAVES,
    'launching': LEAVES,
    'benchmarks': RUNS | LEAVES,
}


def test_imports_go_one_way():
    rooms = {p.relative_to(ROOT / 'spark').parts[0].removesuffix('.py') for p in (ROOT / 'spark').rglob('*.py')}
    assert rooms - {'__init__'} <= set(ALLOWED)
    for path in (ROOT / 'spark').rglob('*.py'):
        room = path.relative_to(ROOT / 'spark').parts[0].removesuffix('.py')
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == 'spark':
                names = [f'spark.{alias.name}' for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or '']
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split('.')
                if parts[0] == 'spark' and len(parts) > 1 and parts[1] != room:
                    assert parts[1] in ALLOWED[room], f'{path}: {name}'
