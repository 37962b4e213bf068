/* Links libpdiff from C: prints what it was built with, and shows how an error comes back. */

#include <pdiff/c_api.h>
#include <stdio.h>

int main(void) {
  const char* isa = NULL;
  if (pdiff_isa_name(&isa) != PDIFF_OK) {
    fprintf(stderr, "pdiff_isa_name: %s\n", pdiff_last_error());
    return 1;
  }
  printf("libpdiff %s, CPU kernels: %s\n", pdiff_version(), isa);
  printf("CUDA: %s, %d device(s)\n", pdiff_built_with_cuda() ? "built" : "not built",
         pdiff_cuda_device_count());

  if (pdiff_select_isa("pdp11") != PDIFF_INVALID_ARGUMENT) {
    fprintf(stderr, "expected an error for an instruction set that does not exist\n");
    return 1;
  }
  printf("as expected: %s\n", pdiff_last_error());
  return 0;
}
