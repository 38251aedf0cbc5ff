# Builds and lays down what is installed. Distributions: `make install DESTDIR=…`; the Debian package: `make deb`, and that of
# another architecture: `make deb ARCH=arm64`, as root on Debian (packaging/cross).
#
# The list of files is here and nowhere else: the package is made of what `install` has laid down.

DESTDIR ?=
CARGO ?= cargo
# The profile that is installed: `release`, or `debug` for the tests, which have built that already.
PROFILE ?= release
TARGET ?= $(or $(CARGO_TARGET_DIR),target)
# Of the package, in Debian's words; not from the environment, where ARCH means other things. packaging/cross says which
# architecture it builds for (CROSS_ARCH), what cargo calls it (CARGO_BUILD_TARGET), and how such a program is stripped
# (CROSS_STRIP) and run (CROSS_RUNNER).
ARCH =
other_arch = $(if $(CROSS_ARCH),,$(if $(ARCH),$(filter-out $(shell dpkg --print-architecture),$(ARCH))))
# `--workspace` where all of it is built anyway: features are then what they were, and nothing is built twice.
CRATES ?= --package supervisor --package helper
# What the package calls itself besides the version of the workspace.
REVISION ?= 1
CARGO_DEB = $(TARGET)/tools/bin/cargo-deb
CARGO_DEB_VERSION = 3.6.2

name = buildomat-user-factory
# The same sources give the same bytes, wherever they are built: no path of this machine is in them, and what has a
# date has the changelog's.
SOURCE_DATE_EPOCH ?= $(shell date --date="$$(sed -n '/^ -- /{s/.*>  //p;q}' packaging/debian/changelog)" +%s)
cargo_home = $(or $(CARGO_HOME),$(HOME)/.cargo)
places = $(CURDIR)=/build $(cargo_home)=/cargo
dated = SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH)
# What the tests have built stays as it is: C sources would be compiled anew for a variable more.
ifeq ($(PROFILE),release)
build: export SOURCE_DATE_EPOCH := $(SOURCE_DATE_EPOCH)
build: export RUSTFLAGS += $(places:%=--remap-path-prefix=%)
build: export CFLAGS += $(places:%=-ffile-prefix-map=%)
endif
# Debian's packages that a build needs besides cargo; each has a program of its name.
packages = gcc make python3
command = $(TARGET)/$(CARGO_BUILD_TARGET:%=%/)$(PROFILE)/user-factory
# Where `assets` of supervisor/Cargo.toml looks, whatever CARGO_TARGET_DIR is.
stage = target/package
doc = $(DESTDIR)/usr/share/doc/$(name)
units = $(wildcard packaging/systemd/*.socket packaging/systemd/*.service packaging/systemd/*.timer)
program = install -D -m 755
file = install -D -m 644

# What must be there is looked for before minutes of building.
ifneq ($(other_arch),)
build deb:
	packaging/cross $(ARCH) make $@
	[ $@ = build ] || install -D -m 644 -t $(TARGET)/debian $(TARGET)/cross/$(ARCH)/debian/$(name)_*-$(REVISION)_$(ARCH).deb
install:
	@echo "of another architecture only the package can be made: make deb ARCH=$(ARCH)" >&2 && exit 1
else
build: tools
	$(CARGO) build $(if $(filter release,$(PROFILE)),--release) $(CRATES)

# Users and directories are made by systemd-sysusers(8) and systemd-tmpfiles(8), which the package calls.
install: build
	$(program) $(command) $(DESTDIR)/usr/bin/user-factory
	$(program) $(command)-helper $(command)-manual $(command)-probe -t $(DESTDIR)/usr/libexec/$(name)
	for unit in $(units); do \
		$(file) $$unit $(DESTDIR)/usr/lib/systemd/system/$${unit##*/} || exit 1; done
	$(file) packaging/systemd/sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/$(name).conf
	$(file) packaging/systemd/tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/$(name).conf
	install -d $(addprefix $(DESTDIR)/usr/share/, man/man1 bash-completion/completions zsh/vendor-completions \
		fish/vendor_completions.d)
	$(CROSS_RUNNER) $(command) generate man >$(DESTDIR)/usr/share/man/man1/user-factory.1
	$(CROSS_RUNNER) $(command) generate bash >$(DESTDIR)/usr/share/bash-completion/completions/user-factory
	$(CROSS_RUNNER) $(command) generate zsh >$(DESTDIR)/usr/share/zsh/vendor-completions/_user-factory
	$(CROSS_RUNNER) $(command) generate fish >$(DESTDIR)/usr/share/fish/vendor_completions.d/user-factory.fish
	$(file) README.md SECURITY.md CONTRIBUTING.md CHANGELOG.md -t $(doc)
	$(dated) packaging/sbom >$(doc)/sbom.cdx.json
	for page in docs/*.md docs/evidence/*.md; do $(file) $$page $(doc)/$$page || exit 1; done
	$(file) packaging/config.toml packaging/minimal.toml -t $(doc)/examples
	$(file) packaging/firewall.nft $(doc)/examples/firewall.nft
	for example in alerts.yml dashboard.json; do \
		$(file) packaging/monitoring/$$example $(doc)/examples/monitoring/$$example || exit 1; done

deb: tools $(CARGO_DEB)
	rm -rf $(stage)
	umask 022 && $(MAKE) install DESTDIR=$(stage)
	$(or $(CROSS_STRIP),strip) --strip-unneeded --remove-section=.comment $(stage)/usr/bin/* $(stage)/usr/libexec/*/*
	$(dated) $(CARGO_DEB) --quiet --no-build --no-strip --package supervisor --deb-revision $(REVISION) \
		$(CARGO_BUILD_TARGET:%=--target %) --output $(TARGET)/debian/
endif

tools:
	@for tool in $(CARGO) $(packages); do command -v $$tool >/dev/null || \
		{ echo "$$tool is not here, and the build needs it: apt install $(packages), and Rust as README.md says" >&2; exit 1; }; done

# A pinned version, beside what it builds: nothing of the user's own is touched.
$(CARGO_DEB):
	env --unset=CARGO_BUILD_TARGET $(CARGO) install cargo-deb --quiet --locked --version $(CARGO_DEB_VERSION) --root $(TARGET)/tools \
		--target-dir $(TARGET)/tools/build
	rm -rf $(TARGET)/tools/build

# Two builds in different folders, compared byte by byte: both programs and the package, which takes a quarter of an hour;
# `make reproducible ONLY=helper` is root's program alone.
reproducible:
	packaging/reproducible "$(ONLY)" "$(other_arch)"

# Are the units what systemd understands? It is silent then. Programs stand where they are installed, not here.
verify:
	rm -rf $(TARGET)/units && mkdir -p $(TARGET)/units
	cp $(units) $(TARGET)/units
	sed -i -E 's,^(Exec[A-Za-z]+)=/[^ ]+,\1=/bin/true,' $(TARGET)/units/*.service
	output=$$(systemd-analyze verify --man=no $(TARGET)/units/* 2>&1); \
		test -z "$$output" || { echo "$$output" >&2; exit 1; }

# What the units expose, in tenths; more than is written here and in docs/deploying.md fails.
security:
	systemd-analyze security --no-pager --offline=yes --threshold=13 packaging/systemd/$(name).service
	systemd-analyze security --no-pager --offline=yes --threshold=57 packaging/systemd/$(name)-helper.service

.PHONY: build install deb tools reproducible verify security
