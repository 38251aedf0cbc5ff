// An agent for measuring: it writes a byte to the FIFO that its last argument names, or that one of the form
// FIFO=PATH does, and waits to be killed. Two megabytes, as the real one has.
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

__attribute__((used)) static const char weight[2 << 20] = {1};

int main(int count, char **arguments) {
    const char *path = arguments[count - 1];
    for (int i = 0; i < count; i++)
        if (!strncmp(arguments[i], "FIFO=", 5))
            path = arguments[i] + 5;
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    write(fd, "x", 1);
    for (;;)
        pause();
}
