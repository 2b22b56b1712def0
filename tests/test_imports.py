"""Imports go one way through the house."""

import ast

from tests.helpers import ROOT

LEAVES = {'errors', 'runtime', 'progress', 'storage', 'config', 'flops', 'devices'}  # what anyone may import
RUNS = {'ops', 'kernels', 'nn', 'data', 'checkpoints', 'training', 'inference'}
ALLOWED = {
    'errors': set(),
    'runtime': {'errors'},
    'progress': set(),
    'storage': {'errors', 'runtime', 'progress'},
    'distributed': {'errors', 'runtime'},
    'config': {'errors'},
    'flops': {'config'},
    'devices': set(),
    'ops': set(),
    'kernels': {'ops'},
    'nn': {'ops', 'kernels', 'config', 'errors'},
    'data': {'config', 'errors', 'runtime', 'progress', 'storage'},
    'checkpoints': {'config', 'errors', 'runtime', 'progress', 'storage'},
    'training': {'nn', 'ops', 'data', 'checkpoints', 'evaluation.in_loop', *LEAVES},  # the one way back: where train.evals asks
    'inference': {'nn', 'ops', 'kernels', 'data', 'checkpoints', *LEAVES},
    'evaluation': RUNS | LEAVES,
    'sweeps': {*RUNS, *LEAVES, 'evaluation.plots'},
    'compiling': {*RUNS, *LEAVES, 'evaluation.evaluate'},  # whose step is compiled, too
    'launching': {'data', *LEAVES},
    # The estimate of cycles compiles ahead of time, for chips that are not there.
    'benchmarks': {*RUNS, *LEAVES, 'compiling.aot'},
}


def imports(path):
    """The dotted name of everything that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
    paths = {path: path.relative_to(ROOT / 'spark').parts[0].removesuffix('.py') for path in (ROOT / 'spark').rglob('*.py')}
    assert set(paths.values()) - {'__init__'} <= set(ALLOWED)
    for path, room in paths.items():
        for name in imports(path):
            allowed = [f'spark.{other}.' for other in (room, *ALLOWED.get(room, ()))]
            assert not name.startswith('spark.') or f'{name}.'.startswith(tuple(allowed)), f'{path}: {name}'


def test_generating_reaches_no_optimizer_and_no_trainer():
    waiting, names = [ROOT / 'scripts' / 'generate.py', *(ROOT / 'spark' / 'inference').glob('*.py')], set()
    while waiting:
        new = set(imports(waiting.pop())) - names
        names |= new
        for name in new:
            parts = name.split('.')
            modules = [ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
            files = [file for module in modules for file in (module.with_suffix('.py'), module / '__init__.py')]
            waiting += [file for file in files if file.exists()]
    assert {'spark.inference.text.continue_prompts', 'spark.nn.transformer.abstract_params', 'tensorstore'} <= names
    assert not [name for name in names if name.startswith(('optax', 'spark.training'))]
