/* A nonlinear wave on a periodic grid, leapfrog in time: the forward steps and their adjoint, in place.

   u'' = c2 lap u - u^3.  Two time levels lie in two buffers, which trade places at every step: the
   new level is written over the older one.  At an even step `a` is the older level, at an odd one `b`. */

#include <stddef.h>

static double laplacian(const double *u, ptrdiff_t ny, ptrdiff_t nx, ptrdiff_t j, ptrdiff_t i)
{
    ptrdiff_t up = (j ? j - 1 : ny - 1) * nx, down = (j + 1 < ny ? j + 1 : 0) * nx;
    ptrdiff_t left = i ? i - 1 : nx - 1, right = i + 1 < nx ? i + 1 : 0;
    return u[up + i] + u[down + i] + u[j * nx + left] + u[j * nx + right] - 4.0 * u[j * nx + i];
}

/* Steps start ... stop-1: p <- 2 u - p + dt2 (c2 lap u - u^3). */
void wave_advance(double *a, double *b, ptrdiff_t ny, ptrdiff_t nx, double c2, double dt2, long start, long stop)
{
    for (long step = start; step < stop; ++step) {
        double *p = step % 2 ? b : a;
        const double *u = step % 2 ? a : b;
        for (ptrdiff_t j = 0; j < ny; ++j)
            for (ptrdiff_t i = 0; i < nx; ++i) {
                double x = u[j * nx + i];
                p[j * nx + i] = 2.0 * x - p[j * nx + i] + dt2 * (c2 * laplacian(u, ny, nx, j, i) - x * x * x);
            }
    }
}

/* The adjoint of one step, from the state before it.  With P and U the adjoints of p and u after the step:
   U += 2 P + dt2 (c2 lap P - 3 u^2 P), then P = -P; the Laplacian is its own adjoint. */
void wave_reverse(const double *a, const double *b, double *adjoint_a, double *adjoint_b, ptrdiff_t ny, ptrdiff_t nx,
                  double c2, double dt2, long step)
{
    const double *u = step % 2 ? a : b;
    double *p_adjoint = step % 2 ? adjoint_b : adjoint_a, *u_adjoint = step % 2 ? adjoint_a : adjoint_b;
    for (ptrdiff_t j = 0; j < ny; ++j)
        for (ptrdiff_t i = 0; i < nx; ++i) {
            double x = u[j * nx + i], lambda = p_adjoint[j * nx + i];
            u_adjoint[j * nx + i] +=
                2.0 * lambda + dt2 * (c2 * laplacian(p_adjoint, ny, nx, j, i) - 3.0 * x * x * lambda);
        }
    for (ptrdiff_t k = 0; k < ny * nx; ++k)
        p_adjoint[k] = -p_adjoint[k];
}
