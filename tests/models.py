"""Small models with exact adjoints, in the three shapes `Sweep` accepts."""

import numpy as np


class Chaotic:
    """In place: a nonlinear map with a state of two arrays and dtypes; checks it is given the right state."""

    def __init__(self, size=5, seed=0):
        generator = np.random.default_rng(seed)
        self.state = [generator.random(size), np.zeros(3, np.int32)]
        self.adjoint = [np.zeros(size), np.zeros(1)]
        self.outputs = []  # nothing beside the state
        self.advanced = 0

    def advance(self, start, stop):
        for step in range(start, stop):
            x, count = self.state
            assert count[0] == step, f"asked for step {step}, holding state {count[0]}"
            x[:] = np.sin(x + 0.1 * step) + 0.3 * x
            count += 1
            self.advanced += 1

    def reverse(self, start, stop):
        assert stop == start + 1
        self._reverse_from(start, self.state)

    def _reverse_from(self, step, state):
        x, count = state
        assert count[0] == step, f"adjoint of step {step}, holding state {count[0]}"
        self.adjoint[0] *= np.cos(x + 0.1 * step) + 0.3
        self.adjoint[1] += self.adjoint[0].sum()

    def start_adjoint(self):
        self.adjoint[0][:] = self.state[0]

    def result(self):
        return self.adjoint[0].tobytes() + self.adjoint[1].tobytes()


class Spanning(Chaotic):
    """In place, and able to reverse several steps at once."""

    max_reverse = 7

    def reverse(self, start, stop):
        assert 1 <= stop - start <= self.max_reverse
        states = []
        for step in range(start, stop):
            states.append([array.copy() for array in self.state])
            if step < stop - 1:
                self.advance(step, step + 1)
                self.advanced -= 1
        for step in range(stop - 1, start - 1, -1):
            self._reverse_from(step, states[step - start])


class OutOfPlace(Chaotic):
    """Runs from any buffers into any others."""

    def advance_into(self, step, source, target):
        assert source[1][0] == step, f"asked for step {step}, given state {source[1][0]}"
        assert all(a is not b for a, b in zip(source, target, strict=True))
        target[0][:] = np.sin(source[0] + 0.1 * step) + 0.3 * source[0]
        target[1][:] = source[1] + 1
        self.advanced += 1

    def reverse_from(self, step, source):
        self._reverse_from(step, source)


class Recording(Chaotic):
    """Lays out what its adjoint needs: here the derivative, and not the state."""

    def __init__(self, size=5, seed=0):
        super().__init__(size, seed)
        self.residual_nbytes = 8 * size
        self.recorded = 0

    def record(self, step, residuals):
        assert residuals.nbytes == self.residual_nbytes
        residuals.view(float)[:] = np.cos(self.state[0] + 0.1 * step) + 0.3
        self.advance(step, step + 1)
        self.advanced -= 1
        self.recorded += 1

    def pull_back(self, step, residuals):
        self.adjoint[0] *= residuals.view(float)
        self.adjoint[1] += self.adjoint[0].sum()


def store_everything(steps, size=5):
    """The result of a reverse sweep with every state kept: what any schedule must reproduce bit for bit."""
    model = Chaotic(size)
    states = []
    for step in range(steps):
        states.append([array.copy() for array in model.state])
        model.advance(step, step + 1)
    model.start_adjoint()
    for step in range(steps - 1, -1, -1):
        model._reverse_from(step, states[step])
    return model.result()
