"""The versions that a run directory tells."""

import json

from etils import epath

from spark.training import environment


def test_a_resume_under_other_versions_says_so(tmp_path, capsys):
    workdir, path = epath.Path(tmp_path), tmp_path / 'environment.json'
    environment.record(workdir)
    environment.record(workdir)
    assert capsys.readouterr().out == ''
    now = json.loads(path.read_text())
    assert now == environment.versions() and {'python', 'jax', 'orbax-checkpoint', 'numpy'} <= now.keys()
    path.write_text(json.dumps(now | {'jax': '0.9.9', 'gone': '1.0'}))
    environment.record(workdir)
    assert capsys.readouterr().out == f'Warning: this run had jax 0.9.9, now {now["jax"]}; gone 1.0, now None\n'
    assert json.loads(path.read_text()) == now
    path.write_text('{"jax": ')
    environment.record(workdir)
    assert json.loads(path.read_text()) == now


def test_of_many_changes_the_first_told_are_those_that_compute(tmp_path, capsys):
    before = dict.fromkeys(environment.versions(), '0') | {'libtpu': '0'}
    (tmp_path / 'environment.json').write_text(json.dumps(before))
    environment.record(epath.Path(tmp_path))
    told = [change.split()[0] for change in capsys.readouterr().out.removeprefix('Warning: this run had ').split('; ')]
    assert told == ['python', 'jax', 'jaxlib', 'libtpu', 'orbax-checkpoint', 'flax', 'optax', 'tensorstore']
