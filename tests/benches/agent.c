// An agent for measuring: it opens the file that its last argument names, or that one of the form STARTED=PATH does,
// and waits to be killed. Two megabytes, as the real one has.
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

__attribute__((used)) static const char weight[2 << 20] = {1};

int main(int count, char **arguments) {
    const char *path = arguments[count - 1];
    for (int i = 0; i < count; i++)
        if (!strncmp(arguments[i], "STARTED=", 8))
            path = arguments[i] + 8;
    open(path, O_RDONLY | O_CLOEXEC);
    for (;;)
        pause();
}
